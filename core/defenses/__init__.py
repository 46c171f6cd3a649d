"""The defenses, by kind; one file a method."""
