/** The compiled module; throws what the compiler complains about. */
export function buildKernels(name: 'dense' | 'kernels' | 'vectors'): Promise<Uint8Array>;
