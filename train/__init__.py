"""QAT: the loop, learned ranges, distillation, and state that survives being killed."""
