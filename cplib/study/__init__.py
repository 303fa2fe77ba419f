"""The paper's tables: which runs they take, where these are kept, what they say."""
