"""Many workers behind one model: where each job goes, and what that does to a fleet."""
