"""The programs: parsing and wiring only. Each is a console script too."""
