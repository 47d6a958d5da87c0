"""Whether a checkpoint that loads is also right: compared, verified, evaluated."""
