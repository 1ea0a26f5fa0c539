"""Subtracting a backdoor: trigger vectors, their scaling, task arithmetic."""
