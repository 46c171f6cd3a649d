"""Is this model backdoored, towards which class, by what trigger."""
