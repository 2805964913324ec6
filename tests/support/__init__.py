"""What tests share: models, inputs, captures, harnesses. No test is here."""
