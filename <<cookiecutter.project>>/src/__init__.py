"""The researcher's rooms: data, models, and what trains, records and reads them back."""
