"""Takes what was built to a device: bundle, ssh, self-test there, and back."""
