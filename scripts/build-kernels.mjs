/** Compiles src/compute/kernels/assembly to WASM and writes it as src/compute/kernels/kernels.generated.ts. Run after changing a kernel. */
import { writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import asc from 'assemblyscript/asc';

const root = fileURLToPath(new URL('../src/compute/kernels/', import.meta.url));
const flags = ['-O3', '--converge', '--noAssert', '--runtime', 'stub', '--enable', 'simd'];
const { error, stderr, binary } = await (async () => {
  let output;
  const result = await asc.main(['assembly/index.ts', '--outFile', 'kernels.wasm', '--baseDir', root, ...flags], {
    writeFile: (_name, data) => {
      output = data;
    },
  });
  return { error: result.error, stderr: result.stderr.toString(), binary: output };
})();
if (error || !binary) {
  process.stderr.write(`${stderr}${error?.message ?? 'no output'}\n`);
  process.exit(1);
}
const base64 = Buffer.from(binary).toString('base64');
await writeFile(
  `${root}kernels.generated.ts`,
  `/** Built from assembly/ by scripts/build-kernels.mjs; ${binary.length} bytes of WASM. Do not edit. */\nexport const KERNELS_WASM =\n  '${base64}';\n`,
);
