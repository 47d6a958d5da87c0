"""From a checkpoint to a model: the plan, its report, and its execution."""
