"""Many runs at once: sweeps, and the tables of the paper beside ours."""
