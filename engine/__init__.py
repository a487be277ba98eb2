"""The training engine: networks, views, optimizer, trainer."""
