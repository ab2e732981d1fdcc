{{/* The loader's arguments that name the sources, the same for every mode, as a YAML list. */}}
{{- define "xds.sourceArgs" -}}
{{- $v := .Values }}
{{- if include "xds.files" . | fromYaml }}
- --configmap={{ include "xds.fullname" . }}-xds
{{- end }}
{{- range $v.configMaps }}
- --configmap={{ with .namespace }}{{ . }}/{{ end }}{{ .name }}{{ with .directory }}:{{ . }}{{ end }}
{{- end }}
{{- with $v.configMapSelector }}
- {{ printf "--configmap-selector=%s" . | quote }}
{{- end }}
{{- if $v.services.enabled }}
- {{ printf "--services=%s" $v.services.selector | quote }}
{{- range $v.services.namespaces }}
- {{ printf "--services-namespace=%s" . | quote }}
{{- end }}
- --endpoints={{ $v.services.endpoints }}
- --format={{ $v.services.format }}
{{- end }}
{{- range $v.secrets }}
- --secret={{ with .namespace }}{{ . }}/{{ end }}{{ .name }}
{{- end }}
{{- if $v.config }}
- --config=/etc/xds-loader/loader.json
{{- end }}
{{- with $v.loader.apiserver }}
- --apiserver={{ . }}
{{- end }}
- --token-file={{ include "xds.tokenDir" . }}/token
- --ca-file={{ include "xds.tokenDir" . }}/ca.crt
- --output-dir={{ include "xds.dir" . }}
{{- with $v.loader.secretMode }}
- --secret-mode={{ . }}
{{- end }}
- --log-format={{ $v.loader.logFormat }}
- --log-level={{ $v.loader.logLevel }}
{{- range $v.loader.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{/* The sidecar's own arguments. */}}
{{- define "xds.sidecarArgs" -}}
{{- if .Values.loader.watch }}
- --watch
{{- end }}
- --sync-interval={{ .Values.loader.syncInterval }}
- --listen=:{{ .Values.loader.port }}
{{- if .Values.loader.confirm }}
- --envoy-admin=http://127.0.0.1:{{ .Values.envoy.adminPort }}
{{- end }}
{{- end }}

{{/* What every container of the loader has. */}}
{{- define "xds.loaderContainer" -}}
image: {{ include "xds.image" (dict "image" .Values.loader.image "tag" .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.loader.image.pullPolicy }}
env:
  - name: POD_NAMESPACE
    valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
  - name: NODE_NAME
    valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
  {{- with .Values.loader.env }}{{ toYaml . | nindent 2 }}{{ end }}
resources: {{- toYaml .Values.loader.resources | nindent 2 }}
securityContext: {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: xds, mountPath: {{ include "xds.dir" . }}}
  - {name: token, mountPath: {{ include "xds.tokenDir" . }}, readOnly: true}
  {{- if .Values.config }}
  - {name: loader-config, mountPath: /etc/xds-loader, readOnly: true}
  {{- end }}
  {{- with .Values.loader.extraVolumeMounts }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/*
What the loader's preStop hook runs. Envoy's image has no shell and its admin interface takes only
POST, on loopback, which no httpGet hook can send; the loader's container shares the loopback and
has Python. /healthcheck/fail closes no listener: each response from then on carries
`connection: close` (HTTP/2: GOAWAY), and /ready answers 503.
*/}}
{{- define "xds.drain" -}}
import http.client, sys, time
admin = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=2)
try:
    admin.request("POST", "/healthcheck/fail")
    admin.getresponse().read()
finally:
    time.sleep(float(sys.argv[2]))
{{- end }}

{{/* Probes, ports and lifecycle of the loader that stays. */}}
{{- define "xds.sidecar" -}}
{{ include "xds.loaderContainer" . }}
args:
  {{- include "xds.sourceArgs" . | nindent 2 }}
  {{- include "xds.sidecarArgs" . | nindent 2 }}
ports:
  - {name: loader, containerPort: {{ .Values.loader.port }}, protocol: TCP}
{{- if .Values.nativeSidecar }}
startupProbe:
  httpGet: {path: /readyz, port: loader}
  {{- toYaml .Values.loader.startupProbe | nindent 2 }}
{{- end }}
livenessProbe:
  httpGet: {path: /healthz, port: loader}
  {{- toYaml .Values.loader.livenessProbe | nindent 2 }}
readinessProbe:
  httpGet: {path: /readyz, port: loader}
  {{- toYaml .Values.loader.readinessProbe | nindent 2 }}
{{- if .Values.loader.lifecycle }}
lifecycle: {{- toYaml .Values.loader.lifecycle | nindent 2 }}
{{- else if .Values.drain.enabled }}
lifecycle:
  preStop:
    exec:
      command:
        - python3
        - -I
        - -S
        - -c
        - | {{- include "xds.drain" . | nindent 10 }}
        - {{ .Values.envoy.adminPort | quote }}
        {{- /* a native sidecar is stopped after Envoy anyhow; a plain one stays as long as Envoy */}}
        - {{ ternary 0 .Values.drain.seconds .Values.nativeSidecar | quote }}
{{- end }}
{{- end }}

{{- define "xds.envoy" -}}
name: envoy
image: {{ include "xds.image" (dict "image" .Values.envoy.image "tag" "") | quote }}
imagePullPolicy: {{ .Values.envoy.image.pullPolicy }}
command: [/usr/local/bin/envoy]
args:
  - --config-path
  - /etc/envoy/envoy.yaml
  - --service-cluster
  - {{ include "xds.fullname" . }}
  - --service-node
  - $(POD_NAME)
  - --log-level
  - {{ .Values.envoy.logLevel | quote }}
  {{- /* hot restart shares memory in /dev/shm with a process that never comes */}}
  - --disable-hot-restart
  {{- with .Values.envoy.concurrency }}
  - --concurrency
  - {{ . | quote }}
  {{- end }}
  {{- range .Values.envoy.extraArgs }}
  - {{ . | quote }}
  {{- end }}
env:
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  {{- with .Values.envoy.env }}{{ toYaml . | nindent 2 }}{{ end }}
ports:
  {{- range $name, $port := .Values.envoy.ports }}
  - {{- mergeOverwrite (dict "name" $name "protocol" "TCP") $port | toYaml | nindent 4 }}
  {{- end }}
  - {name: ready, containerPort: {{ .Values.envoy.readyPort }}, protocol: TCP}
startupProbe:
  httpGet: {path: /ready, port: ready}
  {{- toYaml .Values.envoy.startupProbe | nindent 2 }}
livenessProbe:
  {{- /* not /ready: a draining Envoy says 503 there and must not be killed for it */}}
  tcpSocket: {port: ready}
  {{- toYaml .Values.envoy.livenessProbe | nindent 2 }}
readinessProbe:
  httpGet: {path: /ready, port: ready}
  {{- toYaml .Values.envoy.readinessProbe | nindent 2 }}
{{- if .Values.envoy.lifecycle }}
lifecycle: {{- toYaml .Values.envoy.lifecycle | nindent 2 }}
{{- else if and .Values.drain.enabled (semverCompare ">=1.30-0" (include "xds.kubeVersion" .)) }}
lifecycle:
  preStop:
    sleep: {seconds: {{ .Values.drain.seconds }}}
{{- end }}
resources: {{- toYaml .Values.envoy.resources | nindent 2 }}
securityContext: {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: xds, mountPath: {{ include "xds.dir" . }}, readOnly: true}
  - {name: bootstrap, mountPath: /etc/envoy, readOnly: true}
  {{- with .Values.envoy.extraVolumeMounts }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/* The token of the loader: a volume of its own, so that Envoy's container does not have it. */}}
{{- define "xds.tokenVolume" -}}
name: token
projected:
  defaultMode: 0440
  sources:
    - serviceAccountToken:
        path: token
        expirationSeconds: {{ .Values.serviceAccount.tokenExpirationSeconds }}
    - configMap:
        name: kube-root-ca.crt
        items: [{key: ca.crt, path: ca.crt}]
    - downwardAPI:
        items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]
{{- end }}

{{- define "xds.pod" -}}
serviceAccountName: {{ include "xds.serviceAccountName" . }}
automountServiceAccountToken: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
{{- range $key := list "priorityClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $.Values $key }}
{{ $key }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
initContainers:
  {{- with .Values.extraInitContainers }}{{ toYaml . | nindent 2 }}{{ end }}
{{- if .Values.nativeSidecar }}
  - name: loader
    restartPolicy: Always
    {{- include "xds.sidecar" . | nindent 4 }}
{{- else }}
  - name: loader-init
    {{- include "xds.loaderContainer" . | nindent 4 }}
    args:
      {{- include "xds.sourceArgs" . | nindent 6 }}
      - --onetime
      - --timeout={{ .Values.loader.initTimeout }}
{{- end }}
containers:
  - {{- include "xds.envoy" . | nindent 4 }}
{{- if not .Values.nativeSidecar }}
  - name: loader
    {{- include "xds.sidecar" . | nindent 4 }}
{{- end }}
  {{- with .Values.extraContainers }}{{ toYaml . | nindent 2 }}{{ end }}
volumes:
  - name: xds
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.runtimeVolume.sizeLimit }}}
  - name: bootstrap
    configMap: {name: {{ include "xds.fullname" . }}-bootstrap}
  - {{- include "xds.tokenVolume" . | nindent 4 }}
{{- if .Values.config }}
  - name: loader-config
    configMap: {name: {{ include "xds.fullname" . }}-loader}
{{- end }}
  {{- with .Values.extraVolumes }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
