"""What everybody says: shapes, requests, settings, messages, outcomes. Pure."""
