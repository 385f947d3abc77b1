"""What a pool ratio is worth: latency model, simulator and planner. Imports no torch."""
