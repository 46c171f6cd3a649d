"""What lasts: tables, the life of a job, events, keys, objects and the queue's doorbell. No HTTP, no torch."""
