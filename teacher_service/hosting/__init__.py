"""The teachers that a service has: opened, added, removed, filled in the background, and measured."""
