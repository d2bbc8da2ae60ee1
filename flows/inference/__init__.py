"""Images drawn from a trained model, and the model that MLflow serves."""
