"""What a run leaves: its folder of stored rows, tables, pages, pictures, event files; the terminal."""
