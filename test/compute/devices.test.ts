import { describe, expect, it } from 'vitest';
import { chooseDevice, type DeviceProbe } from '../../src/compute/devices.ts';
import type { Device } from '../../src/compute/engine.ts';
import { deviceUnavailable } from '../../src/compute/ort-errors.ts';

/** A machine with the given devices, and what a product takes on them in milliseconds. */
function machine(times: Partial<Record<Device, number>>, platform: NodeJS.Platform = 'linux'): DeviceProbe & { asked: Device[] } {
  const asked: Device[] = [];
  return {
    asked,
    platform,
    async check(device) {
      asked.push(device);
      if (times[device] === undefined) throw deviceUnavailable(device, new Error('not in this machine'));
    },
    time: async (device) => times[device] ?? Number.NaN,
  };
}

describe('the choice of a device', () => {
  it('takes an explicit device that passes its probe, without a note', async () => {
    expect(await chooseDevice('webgpu', machine({ cpu: 1, webgpu: 100 }))).toEqual({ device: 'webgpu', notes: [] });
  });

  it('refuses an explicit device that fails its probe', async () => {
    await expect(chooseDevice('cuda', machine({ cpu: 1 }))).rejects.toMatchObject({
      code: 'DEVICE_UNAVAILABLE',
      message: expect.stringMatching(/^cuda is not available: not in this machine\. .*CUDA 12/),
    });
  });

  it('falls back to the CPU with a note when that is allowed', async () => {
    const { device, notes } = await chooseDevice('cuda', machine({ cpu: 1 }), true);
    expect(device).toBe('cpu');
    expect(notes).toEqual([expect.stringContaining('Running on cpu instead.')]);
  });

  it('does not fall back from the CPU', async () => {
    await expect(chooseDevice('cpu', machine({}), true)).rejects.toMatchObject({ code: 'DEVICE_UNAVAILABLE' });
  });

  it.each([
    ['CUDA before everything else', { cpu: 1, cuda: 1, webgpu: 0.1, dml: 1 }, 'win32', 'cuda'],
    ['DirectML on Windows', { cpu: 1, dml: 5, webgpu: 0.1 }, 'win32', 'dml'],
    ['no DirectML elsewhere', { cpu: 1, dml: 5 }, 'linux', 'cpu'],
    ['WebGPU that is twice as fast as the CPU', { cpu: 2, webgpu: 1 }, 'linux', 'webgpu'],
    ['the CPU when WebGPU is not twice as fast', { cpu: 2, webgpu: 1.01 }, 'linux', 'cpu'],
    ['the CPU when there is nothing else', { cpu: 1 }, 'darwin', 'cpu'],
    ['no CoreML, which may compute in half precision', { cpu: 1, coreml: 0.1 }, 'darwin', 'cpu'],
  ] as const)('auto takes %s', async (_, times, platform, expected) => {
    expect((await chooseDevice('auto', machine(times, platform))).device).toBe(expected);
  });

  it('auto tells what it tried and why it was not taken', async () => {
    const { notes } = await chooseDevice('auto', machine({ cpu: 2, webgpu: 76 }));
    expect(notes[0]).toContain('cuda is not available');
    expect(notes[1]).toContain('76.0 ms on webgpu, 2.0 ms on cpu');
  });

  it('does not probe a device that cannot be on the platform', async () => {
    const linux = machine({ cpu: 1 });
    await chooseDevice('auto', linux);
    expect(linux.asked).toEqual(['cuda', 'webgpu']);
  });
});
