"""From a configuration to a trained model: schedule, step, loop, run folder."""
