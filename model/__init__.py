"""The GPT as a plain ``nn.Module``; knows nothing of DeepSpeed, files or experiment trackers."""
