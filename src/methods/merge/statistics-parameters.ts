/** What every method that measures on text can be told about the text. */
export const SAMPLES = {
  samples: { type: 'number', summary: "windows of each expert's text that are measured", default: 256, min: 1, integer: true },
  length: { type: 'number', summary: "tokens of a window, at most the model's context", default: 2048, min: 2, integer: true },
} as const;
