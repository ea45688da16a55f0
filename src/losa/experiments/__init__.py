"""The paper's tables on a model of one's own: `losa experiment`."""
