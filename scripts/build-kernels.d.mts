/** The compiled module; throws what the compiler complains about. */
export function buildKernels(): Promise<Uint8Array>;
