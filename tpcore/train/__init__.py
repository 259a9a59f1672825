"""Fine-tuning: configuration, optimizer, schedule, run folders and the training loop."""
