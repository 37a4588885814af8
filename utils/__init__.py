"""What the three scripts share: arguments, files, cards, runs, evaluation, tables and plots."""
