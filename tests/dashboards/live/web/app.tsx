// Draws one dashboard: Grafana's components on data that Prometheus gave.  window.PAGE is {panels, start, end}, each
// panel is Grafana's JSON with `found`: for each query its series.  Heat maps are drawn here, on a canvas: Grafana
// publishes no component for them.
import React, { useEffect, useRef } from 'react';
import { createRoot } from 'react-dom/client';
import {
  applyFieldOverrides, createTheme, DataFrame, dateTime, FieldColorModeId, FieldType, getDisplayProcessor,
  getFieldDisplayName, GrafanaTheme2, toDataFrame,
} from '@grafana/data';
import { BigValue, BigValueColorMode, BigValueGraphMode, PanelChrome, ThemeContext, TimeSeries } from '@grafana/ui';
import { interpolateViridis } from 'd3';

type Series = { metric: Record<string, string>; values: [number, string][] };
type Target = { expr: string; legendFormat: string; format: string };
type PanelData = {
  type: string; title: string; gridPos: { x: number; y: number; w: number; h: number };
  targets: Target[]; found: Series[][]; fieldConfig: any; options: any;
};
const page = (window as any).PAGE as { panels: PanelData[]; start: number; end: number };
const theme = createTheme({ colors: { mode: 'light' } });
const CELL = { width: 58, height: 30 };

const named = (target: Target, series: Series) =>
  target.legendFormat.replace(/{{(\w+)}}/g, (_, label) => series.metric[label] ?? '');

function frames(panel: PanelData): DataFrame[] {
  const { defaults, overrides } = panel.fieldConfig;
  const all: DataFrame[] = [];
  panel.targets.forEach((target, index) => {
    for (const series of panel.found[index]) {
      const name = named(target, series);
      const config: any = { ...defaults, displayName: name, custom: { ...defaults.custom } };
      config.color = defaults.color ?? { mode: FieldColorModeId.PaletteClassic };
      for (const override of overrides.filter((o: any) => o.matcher.options === name)) {
        for (const { id, value } of override.properties) {
          if (id.startsWith('custom.')) {
            config.custom[id.slice(7)] = value;
          } else {
            config[id] = value;
          }
        }
      }
      all.push(toDataFrame({
        fields: [
          { name: 'Time', type: FieldType.time, values: series.values.map(([time]) => time * 1000) },
          { name, type: FieldType.number, config, values: series.values.map(([, value]) => parseFloat(value)) },
        ],
      }));
    }
  });
  return applyFieldOverrides({
    data: all, fieldConfig: { defaults: {}, overrides: [] }, replaceVariables: (text) => text, theme, timeZone: 'utc',
  });
}

function Graph({ panel, width, height }: { panel: PanelData; width: number; height: number }) {
  const range: any = { from: dateTime(page.start * 1000), to: dateTime(page.end * 1000) };
  range.raw = { from: range.from, to: range.to };
  const legend: any = panel.options.legend;
  return (
    <TimeSeries frames={frames(panel)} width={width} height={height} timeRange={range} timeZone="utc" legend={legend}
      options={panel.options} />
  );
}

function Stat({ panel, width, height }: { panel: PanelData; width: number; height: number }) {
  const frame = frames(panel)[0];
  const field = frame.fields[1];
  const display = getDisplayProcessor({ field, theme, timeZone: 'utc' });
  const last = [...field.values].reverse().find((value: number) => !Number.isNaN(value));
  const sparkline: any = { y: { ...field, config: { ...field.config, custom: {} } }, x: frame.fields[0] };
  return (
    <BigValue theme={theme} width={width} height={height} value={display(last)} sparkline={sparkline}
      colorMode={BigValueColorMode.Value} graphMode={BigValueGraphMode.Area}
      justifyMode={panel.options.justifyMode} textMode={panel.options.textMode} wideLayout={panel.options.wideLayout} />
  );
}

// Rows of a heat map from bottom to top, with a value for each time; buckets become what they add to the one below.
function rows(panel: PanelData) {
  const [target] = panel.targets;
  const [series] = panel.found;
  const values = new Map(series.map((one) => [named(target, one), new Map(one.values.map(([t, v]) => [t, +v]))]));
  const names = [...values.keys()];
  if (target.format !== 'heatmap') {
    names.sort().reverse();
    return names.map((name) => ({ name, at: (time: number) => values.get(name)!.get(time) ?? NaN }));
  }
  names.sort((a, b) => parseFloat(a.replace('+Inf', 'Infinity')) - parseFloat(b.replace('+Inf', 'Infinity')));
  return names.map((name, index) => ({
    name: name === '+Inf' ? 'more' : String(parseFloat(name)),
    at: (time: number) => {
      const below = index ? values.get(names[index - 1])!.get(time) ?? NaN : 0;
      return (values.get(name)!.get(time) ?? NaN) - below;
    },
  }));
}

function Heat({ panel, width, height }: { panel: PanelData; width: number; height: number }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const scale = window.devicePixelRatio;
    const context = canvas.current!.getContext('2d')!;
    context.scale(scale, scale);
    context.font = `11px ${theme.typography.fontFamily}`;
    const lines = rows(panel);
    const times = [...new Set(panel.found[0].flatMap((one) => one.values.map(([time]) => time)))].sort((a, b) => a - b);
    const left = 12 + Math.max(...lines.map((line) => context.measureText(line.name).width));
    const step = times[1] - times[0];
    const cell = { w: (width - left - 8) / ((page.end - page.start) / step + 1), h: (height - 24) / lines.length };
    const top = panel.options.color.max ?? Math.max(1e-9, ...lines.flatMap((l) => times.map((t) => l.at(t) || 0)));
    lines.forEach((line, index) => {
      const y = height - 24 - (index + 1) * cell.h;
      context.fillStyle = theme.colors.text.primary;
      context.textAlign = 'right';
      context.fillText(line.name, left - 6, y + cell.h / 2 + 4);
      for (const time of times) {
        const value = line.at(time);
        if (value > 0 || (value === 0 && panel.targets[0].format !== 'heatmap')) {
          context.fillStyle = interpolateViridis(Math.min(1, value / top));
          context.fillRect(left + ((time - page.start) / step) * cell.w, y, cell.w + 0.3, cell.h - 1);
        }
      }
    });
    context.fillStyle = theme.colors.text.primary;
    context.textAlign = 'center';
    for (let time = Math.ceil(page.start / 120) * 120; time < page.end; time += 120) {
      const x = left + ((time - page.start) / step) * cell.w;
      context.fillText(new Date(time * 1000).toISOString().slice(11, 16), x, height - 8);
    }
  });
  const scale = window.devicePixelRatio;
  return <canvas ref={canvas} width={width * scale} height={height * scale} style={{ width, height }} />;
}

const KINDS: Record<string, typeof Graph> = { timeseries: Graph, stat: Stat, heatmap: Heat };

function Page() {
  return (
    <ThemeContext.Provider value={theme}>
      {page.panels.map((panel, index) => {
        const { x, y, w, h } = panel.gridPos;
        const place = { left: x * CELL.width + 4, top: y * CELL.height + 4, position: 'absolute' as const };
        if (panel.type === 'row') {
          return <div key={index} style={{ ...place, paddingTop: 6 }}>{panel.title}</div>;
        }
        const Kind = KINDS[panel.type];
        const empty = panel.found.every((series) => series.length === 0);
        return (
          <div key={index} style={place} className={empty ? 'panel-empty' : 'panel-drawn'}>
            <PanelChrome title={panel.title} width={w * CELL.width - 8} height={h * CELL.height - 8}>
              {(width, height) =>
                empty ? <div style={{ padding: 20 }}>No data</div> : <Kind panel={panel} width={width} height={height} />
              }
            </PanelChrome>
          </div>
        );
      })}
    </ThemeContext.Provider>
  );
}

document.body.style.background = theme.colors.background.canvas;
document.body.style.color = theme.colors.text.primary;
window.onerror = (message) => { document.title = `failed: ${message}`; };
createRoot(document.getElementById('root')!).render(<Page />);
