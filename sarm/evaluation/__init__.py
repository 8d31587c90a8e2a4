"""What interventions do to the reward model and training did to a policy, and the verdict."""
