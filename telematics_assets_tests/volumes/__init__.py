"""The landing stores."""
