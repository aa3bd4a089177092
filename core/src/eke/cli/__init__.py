"""The commands of ``eke``, a module each: find out first, render after."""
