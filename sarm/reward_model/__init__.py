"""A SARM: model, files, SAE, interventions, scoring."""
