"""Finding a backdoor: clean references, statistics and the verdict."""
