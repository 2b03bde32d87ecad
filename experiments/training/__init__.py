"""Training: one compiled step, the loop around it, checkpoints, devices, and what the commands share."""
