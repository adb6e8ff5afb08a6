/** The compiled module; throws what the compiler complains about. */
export function buildKernels(name: 'kernels' | 'vectors'): Promise<Uint8Array>;
