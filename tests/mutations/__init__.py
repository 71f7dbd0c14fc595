"""Mutants of right graphs: whatever changes the function, the proof refuses and ``verify`` sees."""
