"""Where in weight space a backdoor sits: weight differences, spectra, localisation."""
