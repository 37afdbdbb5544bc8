"""The filters of the models, used directly on photographs."""
