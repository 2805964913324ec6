"""The search for the best program under a bound: tables of losses and costs, an integer program, verification, the store."""
