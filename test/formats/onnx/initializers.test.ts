import { describe, expect, it } from 'vitest';
import { initializerFromSource, inlineInitializer } from '../../../formats/onnx/initializers.ts';
import type { Tensor } from '../../../formats/tensor.ts';
import { MemorySource } from '../../support/memory-source.ts';

class CountingSource extends MemorySource {
  bytesRead = 0;

  override async readRows(name: string, start: number, end: number): Promise<Tensor> {
    const rows = await super.readRows(name, start, end);
    this.bytesRead += rows.byteLength;
    return rows;
  }
}

describe('initializers', () => {
  it('held in memory must have the bytes of their shape', async () => {
    const bytes = Uint8Array.of(1, 2);
    expect(await inlineInitializer('w', 'U4', [3], bytes).read(1)).toEqual(Uint8Array.of(2));
    expect(() => inlineInitializer('w', 'U4', [5], bytes)).toThrow(/takes 3 bytes, got 2/);
  });

  it('of a checkpoint yield any byte range and read only the rows it touches', async () => {
    const source = new CountingSource();
    const bytes = Uint8Array.from({ length: 10 * 6 * 2 }, (_, i) => i);
    source.add('t', 'F16', [10, 6], bytes);
    const initializer = initializerFromSource('w', source, 't');
    expect(initializer).toMatchObject({ name: 'w', dtype: 'F16', shape: [10, 6], byteLength: 120 });
    for (let start = 0; start <= 120; start += 5) {
      for (let end = start; end <= 120; end += 7) {
        source.bytesRead = 0;
        expect(await initializer.read(start, end)).toEqual(bytes.slice(start, end));
        expect(source.bytesRead).toBeLessThanOrEqual(end - start + 2 * 12);
      }
    }
    expect(await initializer.read()).toEqual(bytes);
  });

  it('of a checkpoint may be scalars, empty, packed, or of another shape', async () => {
    const source = new MemorySource();
    source.add('scalar', 'F32', [], Uint8Array.of(0, 0, 128, 63));
    source.add('empty', 'F32', [0, 3], new Uint8Array(0));
    source.add('packed', 'U4', [3, 3], Uint8Array.of(1, 2, 3, 4, 5));
    source.add('matrix', 'U8', [2, 3], Uint8Array.of(1, 2, 3, 4, 5, 6));
    expect(await initializerFromSource('w', source, 'scalar').read(2)).toEqual(Uint8Array.of(128, 63));
    expect(await initializerFromSource('w', source, 'empty').read()).toEqual(new Uint8Array(0));
    expect(await initializerFromSource('w', source, 'packed').read(1, 3)).toEqual(Uint8Array.of(2, 3));
    const flat = initializerFromSource('w', source, 'matrix', [6]);
    expect(flat.shape).toEqual([6]);
    expect(await flat.read(2, 5)).toEqual(Uint8Array.of(3, 4, 5));
    expect(() => initializerFromSource('w', source, 'matrix', [7])).toThrow(/number of elements/);
    expect(() => initializerFromSource('w', source, 'none')).toThrow(/no tensor "none"/);
  });
});
