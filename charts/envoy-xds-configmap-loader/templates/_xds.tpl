{{/* The text of an xDS file with these resources. Its version is their hash, so that Envoy's
`version_text` names the one it runs. */}}
{{- define "xds.file" -}}
version_info: {{ .resources | toJson | sha256sum | trunc 16 | quote }}
resources: {{- if .resources }}{{ toYaml .resources | nindent 0 }}{{ else }} []{{ end }}
{{- end }}

{{/* The listener, as YAML: with what Envoy's documentation advises at the edge. */}}
{{- define "xds.listener" -}}
{{- $v := .Values.listener }}
{{- $address := dict "address" .Values.envoy.bindAddress "port_value" $v.port }}
{{- if contains ":" .Values.envoy.bindAddress }}{{ $_ := set $address "ipv4_compat" true }}{{ end }}
{{- $type := "type.googleapis.com/envoy.extensions" }}
{{- $rds := include "xds.rendered" (dict "root" . "file" "rds.yaml" "default" "rds.yaml") }}
{{- if or .Values.upstreams (hasKey .Values.xds "rds.yaml") }}{{ $rds = "rds.yaml" }}{{ end }}
{{- $manager := dict
  "@type" (print $type ".filters.network.http_connection_manager.v3.HttpConnectionManager")
  "stat_prefix" $v.name
  "codec_type" $v.codecType
  "use_remote_address" true
  "normalize_path" true
  "merge_slashes" true
  "path_with_escaped_slashes_action" "REJECT_REQUEST"
  "request_headers_timeout" "10s"
  "stream_idle_timeout" "300s"
  "common_http_protocol_options" (dict
    "idle_timeout" "3600s"
    "headers_with_underscores_action" "REJECT_REQUEST")
  "http2_protocol_options" (dict
    "max_concurrent_streams" 100
    "initial_stream_window_size" 65536
    "initial_connection_window_size" 1048576)
  "rds" (dict
    "route_config_name" (include "xds.routeName" .)
    "config_source" (dict
      "resource_api_version" "V3"
      "path_config_source" (dict "path" (printf "%s/current/%s" (include "xds.dir" .) $rds))))
  "http_filters" (append (deepCopy $v.httpFilters) (dict
    "name" "envoy.filters.http.router"
    "typed_config" (dict "@type" (print $type ".filters.http.router.v3.Router")))) }}
{{- if $v.accessLog }}
{{- $_ := set $manager "access_log" (list (dict
  "name" "envoy.access_loggers.stdout"
  "typed_config" (dict "@type" (print $type ".access_loggers.stream.v3.StdoutAccessLog")))) }}
{{- end }}
{{- $listener := dict
  "@type" "type.googleapis.com/envoy.config.listener.v3.Listener"
  "name" $v.name
  "address" (dict "socket_address" $address)
  "per_connection_buffer_limit_bytes" 32768
  "filter_chains" (list (dict "filters" (list (dict
    "name" "envoy.filters.network.http_connection_manager"
    "typed_config" (mergeOverwrite $manager (deepCopy $v.connectionManager)))))) }}
{{- toYaml (mergeOverwrite $listener (deepCopy $v.extra)) }}
{{- end }}

{{/* The RouteConfiguration's name: the loader's, where the loader renders it. */}}
{{- define "xds.routeName" -}}
{{- dig "route" "name" "services" .Values.config }}
{{- end }}

{{/* One backend's cluster, as YAML; call with (dict "name" ... "backend" ...). */}}
{{- define "xds.cluster" -}}
{{- $b := .backend }}
{{- $cluster := dict
  "@type" "type.googleapis.com/envoy.config.cluster.v3.Cluster"
  "name" .name
  "type" "STRICT_DNS"
  "dns_lookup_family" "V4_PREFERRED"
  "connect_timeout" "1s"
  "per_connection_buffer_limit_bytes" 32768
  "load_assignment" (dict "cluster_name" .name "endpoints" (list (dict "lb_endpoints" (list
    (dict "endpoint" (dict "address" (dict "socket_address" (dict
      "address" $b.address "port_value" $b.port)))))))) }}
{{- if dig "http2" "enabled" false $b }}
{{- $_ := set $cluster "typed_extension_protocol_options" (dict
  "envoy.extensions.upstreams.http.v3.HttpProtocolOptions" (dict
    "@type" "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    "explicit_http_config" (dict "http2_protocol_options" (dig "http2" "protocol_options" dict $b)))) }}
{{- end }}
{{- toYaml (mergeOverwrite $cluster (deepCopy ($b.cluster | default dict))) }}
{{- end }}

{{/*
`clusters` and `virtual_hosts` of the upstreams, as YAML. Upstreams with the same domains share one
virtual host, longest prefix first; Envoy rejects a file with a domain in two virtual hosts. Weights
are as with annotations of Services: a backend without one takes what the others leave of 100,
several share it, and without any weight all have equal parts.
*/}}
{{- define "xds.routes" -}}
{{- $root := . }}
{{- $clusters := dict }}{{ $hosts := dict }}{{ $owner := dict }}
{{- range $name, $upstream := .Values.upstreams }}
{{- $weighted := list }}{{ $total := 0 }}{{ $given := 0 }}{{ $without := 0 }}
{{- range $upstream.backends }}
  {{- if kindIs "invalid" .weight }}{{ $without = add1 $without }}{{ else }}{{ $given = add $given (int64 .weight) }}{{ end }}
{{- end }}
{{- $all := eq (int $without) (len $upstream.backends) }}
{{- range $key, $b := $upstream.backends }}
  {{- $cluster := $b.discovered | default ($key | replace "." "_") }}
  {{- if not $b.discovered }}
    {{- if $root.Values.services.enabled }}
      {{- fail (printf "upstreams.%s.backends.%s: with services.enabled the loader writes cds.yaml: name the cluster in `discovered` (<namespace>/<service>/<port>)" $name $key) }}
    {{- end }}
    {{- if not $b.port }}{{ fail (printf "upstreams.%s.backends.%s: port is required" $name $key) }}{{ end }}
    {{- $backend := mergeOverwrite (dict "address" $key) (deepCopy $b) }}
    {{- $text := include "xds.cluster" (dict "name" $cluster "backend" $backend) }}
    {{- if and (hasKey $clusters $cluster) (ne (get $clusters $cluster) $text) }}
      {{- fail (printf "upstreams.%s.backends.%s: another upstream has a backend of this name that differs" $name $key) }}
    {{- end }}
    {{- $_ := set $clusters $cluster $text }}
  {{- end }}
  {{- /* times the number of those that share, so that each share is a whole number */}}
  {{- $weight := 1 }}
  {{- if not (kindIs "invalid" $b.weight) }}{{ $weight = mul (int64 $b.weight) (max 1 $without) }}
  {{- else if not $all }}{{ $weight = max 0 (sub 100 $given) }}
  {{- end }}
  {{- $total = add $total $weight }}
  {{- $w := dict "name" $cluster "weight" $weight }}
  {{- range list "request_headers_to_add" "request_headers_to_remove" "response_headers_to_add" "response_headers_to_remove" "typed_per_filter_config" }}
    {{- if hasKey $b . }}{{ $_ := set $w . (get $b .) }}{{ end }}
  {{- end }}
  {{- $weighted = append $weighted $w }}
{{- end }}
{{- if eq (int $total) 0 }}{{ fail (printf "upstreams.%s: the weights of its backends sum to 0" $name) }}{{ end }}
{{- if gt (int $total) 4294967295 }}{{ fail (printf "upstreams.%s: the weights of its backends sum to more than 4294967295" $name) }}{{ end }}
{{- $prefix := $upstream.prefix | default "/" }}
{{- $domains := list }}
{{- range $upstream.domains | default (list "*") }}
  {{- if regexMatch ":[0-9]+$" . }}
    {{- fail (printf "upstreams.%s: domain %s: give it without a port: requests match whatever port their Host header has" $name .) }}
  {{- end }}
  {{- $domains = append $domains (trimSuffix ":*" .) }}
{{- end }}
{{- $domains = uniq $domains }}
{{- $id := $domains | sortAlpha | join "," }}
{{- range $domains }}
  {{- $domain := lower . }}
  {{- if ne (get $owner $domain | default $id) $id }}
    {{- fail (printf "upstreams.%s: domain %s is another upstream's beside other domains" $name .) }}
  {{- end }}
  {{- $_ := set $owner $domain $id }}
{{- end }}
{{- $host := get $hosts $id | default (dict "name" $name "domains" $domains "routes" dict) }}
{{- $order := printf "%05d %s" (sub 99999 (len $prefix)) $prefix }}
{{- if hasKey $host.routes $order }}
  {{- fail (printf "upstreams.%s: prefix %s of these domains is another upstream's" $name $prefix) }}
{{- end }}
{{- $route := mergeOverwrite (dict "weighted_clusters" (dict "clusters" $weighted)) (deepCopy ($upstream.route | default dict)) }}
{{- $_ := set $host.routes $order (dict "name" $name "match" (dict "prefix" $prefix) "route" $route) }}
{{- $_ := set $hosts $id $host }}
{{- end }}
clusters:
{{- range $name := keys $clusters | sortAlpha }}
- {{- get $clusters $name | nindent 2 }}
{{- else }} []
{{- end }}
virtual_hosts:
{{- range $id := keys $hosts | sortAlpha }}
{{- $host := get $hosts $id }}
- name: {{ $host.name | quote }}
  domains: {{ toJson $host.domains }}
  routes:
  {{- range $order := keys $host.routes | sortAlpha }}
  - {{- get $host.routes $order | toYaml | nindent 4 }}
  {{- end }}
{{- else }} []
{{- end }}
{{- end }}

{{/* File name to text of every file that the release brings along, as YAML. */}}
{{- define "xds.files" -}}
{{- $files := dict }}
{{- if .Values.listener.enabled }}
  {{- $_ := set $files "lds.yaml" (include "xds.file" (dict "resources" (list (include "xds.listener" . | fromYaml)))) }}
  {{- $made := include "xds.routes" . | fromYaml }}
  {{- if not .Values.services.enabled }}
    {{- $_ := set $files "cds.yaml" (include "xds.file" (dict "resources" $made.clusters)) }}
  {{- end }}
  {{- if or .Values.upstreams (not .Values.services.enabled) }}
    {{- $_ := set $files "rds.yaml" (include "xds.file" (dict "resources" (list (dict
      "@type" "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
      "name" (include "xds.routeName" .)
      "ignore_port_in_host_matching" true
      "virtual_hosts" $made.virtual_hosts)))) }}
  {{- end }}
{{- end }}
{{- range $name, $content := .Values.xds }}
  {{- if kindIs "string" $content }}
    {{- $_ := set $files $name $content }}
  {{- else if kindIs "slice" $content }}
    {{- $_ := set $files $name (include "xds.file" (dict "resources" $content)) }}
  {{- else if hasKey $content "@type" }}
    {{- $_ := set $files $name (include "xds.file" (dict "resources" (list $content))) }}
  {{- else if hasKey $content "version_info" }}
    {{- $_ := set $files $name (toYaml $content) }}
  {{- else }}
    {{- $_ := set $files $name (include "xds.file" (dict "resources" $content.resources)) }}
  {{- end }}
{{- end }}
{{- toYaml $files }}
{{- end }}

{{/* Envoy's overload manager, as YAML; its two limits are the values' `envoy.overload`. */}}
{{- define "xds.overload" -}}
{{- $type := "type.googleapis.com/envoy.extensions.resource_monitors" }}
{{- $heap := "envoy.resource_monitors.fixed_heap" }}
{{- $monitors := list }}{{ $manager := dict }}
{{- with .maxHeap }}
{{- $monitors = append $monitors (dict "name" $heap "typed_config" (dict
  "@type" (print $type ".fixed_heap.v3.FixedHeapConfig")
  "max_heap_size_bytes" (include "xds.bytes" . | int64))) }}
{{- $_ := set $manager "actions" list }}
{{- range $action, $threshold := dict "shrink_heap" 0.9 "stop_accepting_requests" 0.95 }}
{{- $_ := set $manager "actions" (append $manager.actions (dict
  "name" (print "envoy.overload_actions." $action)
  "triggers" (list (dict "name" $heap "threshold" (dict "value" $threshold))))) }}
{{- end }}
{{- end }}
{{- with int64 .maxConnections }}
{{- $monitors = append $monitors (dict
  "name" "envoy.resource_monitors.global_downstream_max_connections"
  "typed_config" (dict
    "@type" (print $type ".downstream_connections.v3.DownstreamConnectionsConfig")
    "max_active_downstream_connections" .)) }}
{{- end }}
{{- with $monitors }}
{{- toYaml (mergeOverwrite $manager (dict "refresh_interval" "0.25s" "resource_monitors" .)) }}
{{- end }}
{{- end }}

{{/* Envoy's bootstrap, as YAML. */}}
{{- define "xds.bootstrap" -}}
{{- $v := .Values.envoy }}
{{- $type := "type.googleapis.com/envoy.extensions" }}
{{- /* a Unix socket has no address that a Service could name (mode 384 is 0600) */}}
{{- $admin := dict "pipe" (dict "path" (include "xds.admin" .) "mode" 384) }}
{{- $ready := dict "address" $v.bindAddress "port_value" $v.readyPort }}
{{- if contains ":" $v.bindAddress }}{{ $_ := set $ready "ipv4_compat" true }}{{ end }}
{{- $manager := dict
  "@type" (print $type ".filters.network.http_connection_manager.v3.HttpConnectionManager")
  "stat_prefix" "ready"
  "route_config" (dict "name" "ready" "virtual_hosts" (list (dict
    "name" "ready" "domains" (list "*")
    "routes" (list (dict
      "match" (dict "path" "/stats/prometheus")
      "route" (dict "cluster" "admin"))))))
  "http_filters" (list
    (dict "name" "envoy.filters.http.health_check" "typed_config" (dict
      "@type" (print $type ".filters.http.health_check.v3.HealthCheck")
      "pass_through_mode" false
      "headers" (list (dict "name" ":path" "string_match" (dict "exact" "/ready")))))
    (dict "name" "envoy.filters.http.router" "typed_config" (dict
      "@type" (print $type ".filters.http.router.v3.Router")))) }}
{{- /* a full Envoy still answers probes and Prometheus */}}
{{- $listener := dict
  "name" "ready"
  "ignore_global_conn_limit" true
  "bypass_overload_manager" true
  "address" (dict "socket_address" $ready)
  "filter_chains" (list (dict "filters" (list (dict
    "name" "envoy.filters.network.http_connection_manager"
    "typed_config" $manager)))) }}
{{- $cluster := dict
  "name" "admin" "type" "STATIC" "connect_timeout" "1s"
  "load_assignment" (dict "cluster_name" "admin" "endpoints" (list (dict "lb_endpoints" (list
    (dict "endpoint" (dict "address" (dict "pipe" (dict "path" (include "xds.admin" .))))))))) }}
{{- $dynamic := dict }}
{{- range $key, $file := dict "cds_config" $v.cds "lds_config" $v.lds }}
{{- if $file }}
{{- $default := printf "%s.yaml" (trimSuffix "_config" $key) }}
{{- if eq $key "cds_config" }}{{ $file = include "xds.rendered" (dict "root" $ "file" $file "default" $default) }}{{ end }}
{{- $_ := set $dynamic $key (dict
  "resource_api_version" "V3"
  "path_config_source" (dict "path" (printf "%s/current/%s" (include "xds.dir" $) $file))) }}
{{- end }}
{{- end }}
{{- $user := deepCopy $v.bootstrap }}
{{- $static := $user.static_resources | default dict }}
{{- $base := dict
  "admin" (dict "address" $admin)
  "dynamic_resources" $dynamic
  "deferred_stat_options" (dict "enable_deferred_creation_stats" true) }}
{{- with include "xds.overload" $v.overload | fromYaml }}{{ $_ := set $base "overload_manager" . }}{{ end }}
{{- $bootstrap := mergeOverwrite $base $user }}
{{- $_ := set $bootstrap "static_resources" (mergeOverwrite (deepCopy $static) (dict
  "listeners" (prepend ($static.listeners | default list) $listener)
  "clusters" (prepend ($static.clusters | default list) $cluster))) }}
{{- toYaml $bootstrap }}
{{- end }}
