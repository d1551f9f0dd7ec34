"""The planner service: a pi0.5 model that writes subtasks, behind gRPC."""
