"""What a transformer looks like from here: its linear sites, loaded one block at a time."""
