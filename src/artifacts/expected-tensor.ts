/** Reading a tensor whose header a layout prescribes. */
import type { TensorDeclaration, TensorSource } from '../../formats/tensor.ts';
import { FormatError } from '../errors.ts';

/** The tensor's bytes. Throws FormatError `layout-tensor-missing` or `layout-tensor-shape` when its header is not the expected one. */
export async function readExpected(source: TensorSource, expected: TensorDeclaration): Promise<Uint8Array> {
  const info = source.tensors.get(expected.name);
  const wanted = `${expected.dtype} [${expected.shape.join(', ')}]`;
  if (!info) throw new FormatError(source.path, 'layout-tensor-missing', `the layout needs tensor "${expected.name}", ${wanted}`);
  const found = `${info.dtype} [${info.shape.join(', ')}]`;
  if (found !== wanted) {
    throw new FormatError(
      source.path,
      'layout-tensor-shape',
      `tensor "${expected.name}" is ${found}, the layout needs ${wanted}`,
    );
  }
  return (await source.read(expected.name)).data;
}
