/** Compiles src/compute/kernels/assembly to WASM and writes it as src/compute/kernels/kernels.generated.ts. Run after changing a kernel. */
import { writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import asc from 'assemblyscript/asc';

const root = fileURLToPath(new URL('../src/compute/kernels/', import.meta.url));
const FLAGS = ['-O3', '--converge', '--noAssert', '--runtime', 'stub', '--enable', 'simd'];

/**
 * The compiled module; throws what the compiler complains about.
 * @returns {Promise<Uint8Array>}
 */
export async function buildKernels() {
  /** @type {Uint8Array | undefined} */
  let binary;
  const { error, stderr } = await asc.main(['assembly/index.ts', '--outFile', 'kernels.wasm', '--baseDir', root, ...FLAGS], {
    writeFile: (_name, data) => {
      binary = data;
    },
  });
  if (error || !binary) throw new Error(`${stderr}${error?.message ?? 'no output'}`);
  return binary;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const binary = await buildKernels();
  const base64 = Buffer.from(binary).toString('base64');
  await writeFile(
    `${root}kernels.generated.ts`,
    `/** Built from assembly/ by scripts/build-kernels.mjs; ${binary.length} bytes of WASM. Do not edit. */\nexport const KERNELS_WASM =\n  '${base64}';\n`,
  );
}
