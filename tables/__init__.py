"""Tables from small declarative files: one command trains, repairs, measures and renders them (docs/tables.md)."""
