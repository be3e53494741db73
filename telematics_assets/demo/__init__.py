"""A fleet that needs nobody else: simulated vehicles, and the run that `telematics demo` shows."""
