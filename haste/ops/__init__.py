"""Operations on a results folder: what will run and its cost, what is running, what can be removed. No torch."""
