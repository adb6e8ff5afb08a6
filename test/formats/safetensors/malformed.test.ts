import { describe, expect, it } from 'vitest';
import { openSafetensors } from '../../../formats/safetensors/reader.ts';
import { FormatError, UnsupportedError } from '../../../src/errors.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';
import { entry, MALFORMED_SAFETENSORS, safetensorsBytes } from '../malformed/safetensors.ts';

const scratch = scratchFolder();

async function refusal(path: string): Promise<unknown> {
  try {
    const source = await openSafetensors(path);
    await source.close();
  } catch (error) {
    return error;
  }
  return 'it was accepted';
}

describe('a malformed file', () => {
  it.each(MALFORMED_SAFETENSORS)('$name is refused by rule $rule', async ({ name, rule, bytes }) => {
    const path = scratch.write(name, bytes);
    const error = await refusal(path);
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ rule, path });
    expect((error as Error).message).toMatch(/^[^\n]{1,600}$/);
  });

  it('has a name of its own', () => {
    const names = MALFORMED_SAFETENSORS.map(({ name }) => name);
    expect(new Set(names).size).toBe(names.length);
  });

  it('is told apart from a sound file of an element type that is not read', async () => {
    for (const dtype of ['C64', 'F4', 'F8_E8M0']) {
      const error = await refusal(
        scratch.write(`${dtype}.safetensors`, safetensorsBytes(`{"a":${entry(dtype, '[1]', '[0,8]')}}`, 8)),
      );
      expect(error).toBeInstanceOf(UnsupportedError);
      expect((error as Error).message).toContain(`"a" is ${dtype}; pcomp reads F64, F32, F16, BF16`);
    }
  });

  it('cannot put line breaks or endless names into messages', async () => {
    const name = `line\nbreak${'x'.repeat(10_000)}`;
    const error = await refusal(scratch.write('names.safetensors', safetensorsBytes(`{${JSON.stringify(name)}:null}`)));
    expect((error as Error).message).toMatch(/^[^\n]{1,500}\[entry-not-object\]$/);
  });
});

describe('an unusual but sound file', () => {
  it('may hold nothing at all', async () => {
    await using source = await openSafetensors(scratch.write('nothing.safetensors', safetensorsBytes('{}')));
    expect(source.tensors.size).toBe(0);
    expect(source.metadata.size).toBe(0);
  });

  it('may use names that objects inherit', async () => {
    const header = `{"constructor":${entry('U8', '[1]', '[0,1]')},"toString":${entry('U8', '[1]', '[1,2]')},"":${entry('U8', '[1]', '[2,3]')}}`;
    await using source = await openSafetensors(scratch.write('inherited.safetensors', safetensorsBytes(header, 3)));
    expect([...source.tensors.keys()]).toEqual(['constructor', 'toString', '']);
    expect(source.tensors.has('hasOwnProperty')).toBe(false);
    await expect(source.read('hasOwnProperty')).rejects.toMatchObject({ rule: 'tensor-missing' });
  });

  it('may hold empty tensors at any border and scalars, unaligned and listed in any order', async () => {
    const header = `{"z":${entry('F32', '[]', '[1,5]')},"a":${entry('U8', '[]', '[0,1]')},"e":${entry('F64', '[3,0]', '[1,1]')},"end":${entry('I8', '[0]', '[5,5]')}}  \n`;
    await using source = await openSafetensors(scratch.write('borders.safetensors', safetensorsBytes(header, 5)));
    expect([...source.tensors.keys()]).toEqual(['a', 'e', 'z', 'end']);
    expect((await source.read('e')).data).toHaveLength(0);
    expect(await source.readRows('e', 1, 3)).toMatchObject({ shape: [2, 0], byteLength: 0 });
    expect((await source.read('z')).byteLength).toBe(4);
  });
});
