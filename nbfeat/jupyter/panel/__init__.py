"""The widget panel: choose and run an extraction by clicking."""
