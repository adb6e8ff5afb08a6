/** Compiles src/compute/kernels/assembly to WASM and writes src/compute/kernels/*.generated.ts. Run after changing a kernel. */
import { writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import asc from 'assemblyscript/asc';

const root = fileURLToPath(new URL('../src/compute/kernels/', import.meta.url));
const FLAGS = ['-O3', '--converge', '--noAssert', '--runtime', 'stub', '--enable', 'simd'];
/** Memory that is shared can grow without its views becoming stale. 65536 pages are all that 32 bits address. */
const SHARED = ['--enable', 'threads', '--importMemory', '--sharedMemory', '--initialMemory', '1', '--maximumMemory', '65536'];

/** The modules: entry, flags of their own, and the constant that holds them. */
export const MODULES = {
  kernels: { entry: 'assembly/index.ts', flags: [], constant: 'KERNELS_WASM' },
  vectors: { entry: 'assembly/vectors/index.ts', flags: SHARED, constant: 'VECTORS_WASM' },
  dense: { entry: 'assembly/dense/index.ts', flags: [], constant: 'DENSE_WASM' },
};

/**
 * The compiled module; throws what the compiler complains about.
 * @param {keyof typeof MODULES} name
 * @returns {Promise<Uint8Array>}
 */
export async function buildKernels(name) {
  const { entry, flags } = MODULES[name];
  /** @type {Uint8Array | undefined} */
  let binary;
  const { error, stderr } = await asc.main([entry, '--outFile', 'kernels.wasm', '--baseDir', root, ...FLAGS, ...flags], {
    writeFile: (_name, data) => {
      binary = data;
    },
  });
  if (error || !binary) throw new Error(`${stderr}${error?.message ?? 'no output'}`);
  return binary;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  for (const [name, { constant }] of Object.entries(MODULES)) {
    const binary = await buildKernels(name);
    const base64 = Buffer.from(binary).toString('base64');
    await writeFile(
      `${root}${name}.generated.ts`,
      `/** Built from assembly/ by scripts/build-kernels.mjs; ${binary.length} bytes of WASM. Do not edit. */\nexport const ${constant} =\n  '${base64}';\n`,
    );
  }
}
