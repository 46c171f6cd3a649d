"""The papers' tables and the speed comparisons, with their recorded results."""
